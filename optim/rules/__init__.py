"""Update rules: gradient (or its coordinates) in, direction out. One matrix at a time, no names or ranks."""
