"""Starting, watching and stopping the processes of one fleet on this machine."""
