// One colour per token id: the colours of the token maps in the package's reports.

const GOLDEN_RATIO = 0.618034;
const SATURATION = 0.62;

/** Return [red, green, blue], 0 to 255. */
export function colourOf(id) {
  const hue = (id * GOLDEN_RATIO) % 1;
  const value = 0.55 + 0.4 * ((id * 0.381966) % 1);
  const channel = (offset) => {
    const at = (offset + hue * 6) % 6;
    return Math.round(255 * value * (1 - SATURATION * Math.max(0, Math.min(at, 4 - at, 1))));
  };
  return [channel(5), channel(3), channel(1)];
}
