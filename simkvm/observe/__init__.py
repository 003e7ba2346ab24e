"""What is seen of a run: accounts, histograms, the safety oracle, the record."""
