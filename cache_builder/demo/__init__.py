"""The whole route on real images, as commands that a user could type, and a report to look at."""
