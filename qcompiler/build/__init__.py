"""The steps of a compilation between the public functions and the parts that do the work."""
