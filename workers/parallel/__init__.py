"""Process groups, and what is summed over them."""
