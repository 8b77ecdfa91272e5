"""DICOM: bytes to slices or reasons, series in order, masks back as DICOM SEG, identities to pseudonyms."""
