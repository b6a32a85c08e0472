"""What makes the programs run and no reader needs to open: command lines, processes, files."""
