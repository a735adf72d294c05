"""Any nuScenes-format fleet: boxes to questions, LiDAR and map to views."""
