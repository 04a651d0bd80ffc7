"""What models have in common, and how to estimate what a method needs to know about them."""
