"""What every room uses and nothing of the method: progress, format, files, texts, data sets, model loading."""
