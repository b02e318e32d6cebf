"""What is learned, and one step of it: learners, losses, optimizer, schedules, health."""
