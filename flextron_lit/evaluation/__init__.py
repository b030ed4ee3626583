"""What networks within budgets lose: losses of documents with intervals, and tasks of the LM evaluation harness."""
