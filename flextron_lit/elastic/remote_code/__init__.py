"""What is copied beside the weights of a model that no stock class holds: torch and transformers alone load it."""
