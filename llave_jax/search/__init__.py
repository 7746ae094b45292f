"""An index of embedded items on disk: a LanceDB table with vectors, metadata and thumbnails."""
