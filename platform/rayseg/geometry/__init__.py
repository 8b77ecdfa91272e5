"""Geometry: grids of slices in the patient, their planes, order along the normal, distances, stacks and volumes."""
