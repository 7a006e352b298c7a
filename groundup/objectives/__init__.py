"""What is good? Pure functions of tensors, each a sum and a count."""
