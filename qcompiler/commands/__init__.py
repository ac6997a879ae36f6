"""One module a command of `qcompile`; what is slow to import is imported when the command runs."""
