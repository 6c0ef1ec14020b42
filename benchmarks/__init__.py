"""One script a question; each prints a table and says on which machine."""
