"""What a model can do: needle recall and bits per byte."""
