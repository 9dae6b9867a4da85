"""What a model consists of, how large it is and what it costs, beside what was published."""
