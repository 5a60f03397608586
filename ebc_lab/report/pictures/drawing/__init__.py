"""What every picture is drawn with: sheets, looks, axes of losses, and runs as arrays."""
