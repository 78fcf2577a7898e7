"""What a model is: which layers and blocks it has, who reads what, and how it is called."""
