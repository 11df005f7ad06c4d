"""What a card, an image or any machine needs so that its first boot makes it a device."""
