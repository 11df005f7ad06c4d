"""What keeps a device that is broken, or means ill, from spoiling what the others learn."""
