"""Judge a trained classifier: accuracy under attack, effective margins."""
