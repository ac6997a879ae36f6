"""The `qcompiler.solvers` package (this folder is linked into `qcompiler/`)."""

if __name__ != "qcompiler.solvers":
    raise ImportError("import qcompiler.solvers, not solvers: a second copy of the module would not share its state")
