//! Pictures of a slice: the truth beside the prediction, on the grey image, as PNG.
//!
//! Each class is a translucent area with an opaque contour, in the colours of Okabe and Ito,
//! which people with any of the common colour-vision deficiencies can tell apart.

use super::volumes::Size;

/// Colours of the foreground classes, red-green-blue; class 1 takes the first, then round again.
pub const CLASS_COLOURS: [[u8; 3]; 7] = [
    [230, 159, 0],   // orange
    [86, 180, 233],  // sky blue
    [0, 158, 115],   // bluish green
    [240, 228, 66],  // yellow
    [0, 114, 178],   // blue
    [213, 94, 0],    // vermilion
    [204, 121, 167], // reddish purple
];

const AREA_OPACITY: f32 = 0.3;
/// Pictures are enlarged by a whole factor until they are at least this wide and high.
const SIDE_MIN: usize = 256;
const GAP: usize = 8;
const GAP_GREY: u8 = 128;

/// The colour of a foreground class.
#[must_use]
pub fn class_colour(class: u8) -> [u8; 3] {
    CLASS_COLOURS[usize::from(class.saturating_sub(1)) % CLASS_COLOURS.len()]
}

/// Why no picture could be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OverlayError {
    /// Image, truth and prediction are not all of the stated, non-empty size.
    #[error("a slice of {height} x {width} pixels does not fit its buffers")]
    Size {
        /// Rows.
        height: usize,
        /// Columns.
        width: usize,
    },
    /// The encoder failed.
    #[error("encode the picture")]
    Encode(#[from] png::EncodingError),
}

/// Draws one slice, truth on the left, prediction on the right. All buffers are `[h, w]`.
///
/// # Errors
/// When the sizes disagree.
pub fn overlay_png(
    image: &[f32],
    truth: &[u8],
    prediction: &[u8],
    (h, w): Size,
) -> Result<Vec<u8>, OverlayError> {
    if h * w == 0 || [image.len(), truth.len(), prediction.len()] != [h * w; 3] {
        return Err(OverlayError::Size { height: h, width: w });
    }
    let scale = SIDE_MIN.div_ceil(h.min(w));
    let (height, width) = (h * scale, 2 * w * scale + GAP);
    let mut pixels = vec![GAP_GREY; height * width * 3];
    let grey = stretch(image);
    for (labels, left) in [(truth, 0), (prediction, w * scale + GAP)] {
        let panel = Panel { grey: &grey, labels, size: (h, w), scale };
        for y in 0..height {
            for x in 0..w * scale {
                let at = (y * width + left + x) * 3;
                pixels[at..at + 3].copy_from_slice(&panel.pixel(y, x));
            }
        }
    }
    encode(&pixels, width, height)
}

/// Intensities as grey levels, the slice's own range stretched over them.
fn stretch(image: &[f32]) -> Vec<u8> {
    let finite = || image.iter().copied().filter(|v| v.is_finite());
    let (low, high) = (finite().fold(f32::MAX, f32::min), finite().fold(f32::MIN, f32::max));
    let range = (high - low).max(f32::MIN_POSITIVE);
    image.iter().map(|v| ((v - low) / range * 255.0).round() as u8).collect()
}

struct Panel<'a> {
    grey: &'a [u8],
    labels: &'a [u8],
    size: Size,
    scale: usize,
}

impl Panel<'_> {
    /// The label at an enlarged pixel; background outside.
    fn label(&self, y: Option<usize>, x: Option<usize>) -> u8 {
        let (Some(y), Some(x)) = (y, x) else { return 0 };
        let (y, x) = (y / self.scale, x / self.scale);
        if y < self.size.0 && x < self.size.1 { self.labels[y * self.size.1 + x] } else { 0 }
    }

    fn pixel(&self, y: usize, x: usize) -> [u8; 3] {
        let grey = self.grey[y / self.scale * self.size.1 + x / self.scale];
        let class = self.label(Some(y), Some(x));
        if class == 0 {
            return [grey; 3];
        }
        let neighbours = [
            (y.checked_sub(1), Some(x)),
            (Some(y + 1), Some(x)),
            (Some(y), x.checked_sub(1)),
            (Some(y), Some(x + 1)),
        ];
        let on_contour = neighbours.iter().any(|(y, x)| self.label(*y, *x) != class);
        let opacity = if on_contour { 1.0 } else { AREA_OPACITY };
        class_colour(class)
            .map(|c| (f32::from(c) * opacity + f32::from(grey) * (1.0 - opacity)).round() as u8)
    }
}

fn encode(pixels: &[u8], width: usize, height: usize) -> Result<Vec<u8>, OverlayError> {
    let too_large = |_| OverlayError::Size { height, width };
    let (w, h) =
        (u32::try_from(width).map_err(too_large)?, u32::try_from(height).map_err(too_large)?);
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, w, h);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    let mut writer = encoder.write_header()?;
    writer.write_image_data(pixels)?;
    writer.finish()?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contours_are_opaque_areas_translucent_and_background_grey() {
        let mut truth = vec![0; 256 * 256];
        for y in 10..20 {
            truth[y * 256 + 10..y * 256 + 20].fill(2);
        }
        let mut image = vec![0.0; 256 * 256];
        image[0] = 1.0;
        let bytes = overlay_png(&image, &truth, &vec![0; 256 * 256], (256, 256)).unwrap();
        let mut reader = png::Decoder::new(std::io::Cursor::new(bytes)).read_info().unwrap();
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        let info = reader.next_frame(&mut pixels).unwrap();
        assert_eq!((info.width, info.height), (2 * 256 + 8, 256));
        let at = |y: usize, x: usize| -> [u8; 3] {
            pixels[(y * 520 + x) * 3..][..3].try_into().unwrap()
        };
        assert_eq!(at(10, 15), class_colour(2));
        assert_eq!(at(15, 15), class_colour(2).map(|c| (f32::from(c) * 0.3).round() as u8));
        assert_eq!(at(0, 0), [255; 3]);
        assert_eq!(at(15, 264 + 15), [0; 3], "nothing was predicted there");
    }

    #[test]
    fn sizes_that_disagree_are_refused() {
        assert!(overlay_png(&[0.0; 4], &[0; 4], &[0; 3], (2, 2)).is_err());
        assert!(overlay_png(&[], &[], &[], (0, 2)).is_err());
    }
}
