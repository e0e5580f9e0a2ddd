"""The command line: one function a command, one small file a group of commands, heavy imports inside."""
