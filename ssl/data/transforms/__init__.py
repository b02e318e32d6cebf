"""What is done to a decoded image: crops and colors."""
