"""Talk to the Hub patiently: retries, sentences for failures, datasets."""
