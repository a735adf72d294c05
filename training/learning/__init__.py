"""What the training stages share: examples, batches, features, trainers, checks."""
