"""Reports to open in a browser: one HTML file each, with everything that it needs inside."""
