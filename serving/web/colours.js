// Of the classes: Okabe and Ito's, which are told apart by the colour-blind; the same as in the files to download.

export const COLOURS = [[213, 94, 0], [0, 114, 178], [0, 158, 115], [204, 121, 167], [230, 159, 0], [86, 180, 233], [240, 228, 66]];

export const colour = value => COLOURS[(value - 1) % COLOURS.length];
