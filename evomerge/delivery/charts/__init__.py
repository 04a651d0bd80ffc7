"""Charts as small SVG drawings: for pages, which set their colours, and as files of their own."""
