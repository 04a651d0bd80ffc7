"""`evomerge analyze`: where fine-tunes agree or conflict, in the terminal, as JSON, and as a page."""
