"""MMEB-V2: 78 tasks of images, videos and visual documents."""
