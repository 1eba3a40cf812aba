"""Text for people: every function takes figures and gives lines, and parses no argument."""
