"""Where the controller's journal is kept."""
