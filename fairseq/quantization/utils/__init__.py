"""The import paths of I-BERT."""
