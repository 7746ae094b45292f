"""The mesh of devices, where arrays lie on it, and the processes of a job."""
