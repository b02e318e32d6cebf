"""What a run is: its settings, their defaults, and a user's mistakes in words."""
