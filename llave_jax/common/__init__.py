"""What every room uses: files written whole, progress."""
