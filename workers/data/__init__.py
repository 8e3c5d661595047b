"""What sequences a worker holds, where they come from, and how they travel."""
