"""The window on a replica: pause, apply, commit, resume, and the controller that opens it."""
