"""Starting workers and master: by command line, never by import."""
