"""What a run trains, one folder each."""
