"""Update rules: gradient (or its coordinates) in, direction out. One matrix at a time; no names, hooks or ranks."""
