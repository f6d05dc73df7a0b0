"""What the gates of trained SE blocks do: statistics over images and classes, and what follows from them."""
