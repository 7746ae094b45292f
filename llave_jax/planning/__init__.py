"""What a run will take, before any accelerator is rented."""
