"""The configuration: its model, how it is read and checked, and the one table of options."""
