//! Draws one phantom: a heart's parameters, then each slice's pixels and labels.
//!
//! Lengths are fractions of the shorter side unless a name says otherwise.

use std::f32::consts::{PI, TAU};

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use super::SynthOptions;
use crate::data::permutation::key_of;
use crate::data::write::NewSlice;

/// Keeps phantoms apart from whatever else is drawn from the same seed.
const DOMAIN: u64 = 0x7068_616e_746f_6d73; // "phantoms"

/// When in the beat the volume was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Frame {
    /// Filled.
    Diastole = 1,
    /// Contracted.
    Systole = 2,
}

impl Frame {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Diastole => "ed",
            Self::Systole => "es",
        }
    }
}

/// Uniform and normal numbers from a keyed stream.
struct Draws(ChaCha8Rng);

impl Draws {
    fn new(key: &[u64]) -> Self {
        Self(ChaCha8Rng::seed_from_u64(key_of(key)))
    }

    fn uniform(&mut self, low: f32, high: f32) -> f32 {
        low + (high - low) * ((self.0.next_u32() >> 8) as f32 / (1 << 24) as f32)
    }

    fn whole(&mut self, (low, high): (u32, u32)) -> u32 {
        low + ((u64::from(self.0.next_u32()) * u64::from(high - low + 1)) >> 32) as u32
    }

    /// Two independent standard normals (Box and Muller).
    fn normals(&mut self) -> (f32, f32) {
        let radius = (-2.0 * self.uniform(1e-7, 1.0).ln()).sqrt();
        let (sine, cosine) = (TAU * self.uniform(0.0, 1.0)).sin_cos();
        (radius * cosine, radius * sine)
    }
}

/// Something in the picture that is no heart: a blob, or a ring.
#[derive(Debug, Clone, Copy)]
struct Distractor {
    y: f32,
    x: f32,
    radius: f32,
    intensity: f32,
    ring: bool,
}

/// All that is fixed for one patient.
pub(super) struct Heart {
    key: [u64; 3],
    height: u32,
    width: u32,
    slices: u32,
    intensity_steps: Option<f32>,
    /// Off-centre position, pixels.
    centre_px: (f32, f32),
    /// Direction from the left ventricle to the right one.
    towards_rv: f32,
    /// Radius of the left ventricle's cavity at the base, filled.
    lv_radius: f32,
    wall: f32,
    rv_reach: f32,
    ellipticity: f32,
    /// How far the cavity shrinks in systole.
    contraction: f32,
    blood: f32,
    muscle: f32,
    tissue: f32,
    lung: f32,
    blur_px: f32,
    noise: f32,
    gamma: f32,
    bias: [f32; 3],
    distractors: Vec<Distractor>,
    mm_per_px: f64,
    mm_per_slice: f64,
}

impl Heart {
    pub(super) fn draw(options: &SynthOptions, patient: u32) -> Self {
        let key = [DOMAIN, options.seed, u64::from(patient)];
        let mut draws = Draws::new(&key);
        let (height, width) = (draws.whole(options.side_px), draws.whole(options.side_px));
        let side = height.min(width) as f32;
        let d = &mut draws;
        let centre_px = (
            height as f32 * 0.5 + side * d.uniform(-0.1, 0.1),
            width as f32 * 0.5 + side * d.uniform(-0.06, 0.14),
        );
        let distractors = (0..d.whole((3, 6)))
            .map(|_| {
                let (angle, far) = (d.uniform(0.0, TAU), d.uniform(0.36, 0.5));
                Distractor {
                    y: 0.5 + far * angle.sin(),
                    x: 0.5 + far * angle.cos(),
                    radius: d.uniform(0.03, 0.1),
                    intensity: d.uniform(0.35, 1.0),
                    ring: d.uniform(0.0, 1.0) < 0.4,
                }
            })
            .collect();
        let muscle = d.uniform(0.18, 0.4);
        Self {
            key,
            height,
            width,
            slices: d.whole(options.slices),
            intensity_steps: options.intensity_steps.map(|steps| steps.max(1) as f32),
            centre_px,
            towards_rv: PI + d.uniform(-0.6, 0.6),
            lv_radius: d.uniform(0.12, 0.17),
            wall: d.uniform(0.05, 0.085),
            rv_reach: d.uniform(0.85, 1.25),
            ellipticity: d.uniform(0.88, 1.14),
            contraction: d.uniform(0.55, 0.8),
            blood: d.uniform(0.7, 1.0),
            muscle,
            tissue: muscle + d.uniform(0.04, 0.2),
            lung: d.uniform(0.02, 0.14),
            blur_px: d.uniform(0.4, 1.1),
            noise: d.uniform(0.02, 0.07),
            gamma: d.uniform(0.75, 1.35),
            bias: [d.uniform(-0.3, 0.3), d.uniform(-0.3, 0.3), d.uniform(-0.25, 0.25)],
            distractors,
            mm_per_px: f64::from(d.uniform(1.3, 1.9)),
            mm_per_slice: f64::from(d.whole((5, 10))),
        }
    }

    pub(super) fn spacing_mm(&self) -> [f64; 3] {
        [self.mm_per_slice, self.mm_per_px, self.mm_per_px]
    }

    pub(super) fn slices(&self, frame: Frame) -> Vec<NewSlice> {
        let shape = (self.height as usize, self.width as usize);
        let drawn = (0..self.slices).map(|slice| self.slice(frame, slice));
        let (mut images, labels): (Vec<Vec<f32>>, Vec<Vec<u8>>) = drawn.unzip();
        // Intensities are scaled to [0, 1] over the volume, as for real data.
        let all = || images.iter().flatten().copied();
        let (low, high) = (all().fold(f32::MAX, f32::min), all().fold(f32::MIN, f32::max));
        let scale = 1.0 / (high - low).max(f32::MIN_POSITIVE);
        for value in images.iter_mut().flatten() {
            *value = ((*value - low) * scale).clamp(0.0, 1.0);
            if let Some(steps) = self.intensity_steps {
                *value = (*value * steps).round() / steps;
            }
        }
        let numbered = (0..).zip(images).zip(labels);
        numbered
            .map(|((slice, image), label)| NewSlice { slice, shape, image, label: Some(label) })
            .collect()
    }

    fn slice(&self, frame: Frame, slice: u32) -> (Vec<f32>, Vec<u8>) {
        let key = [self.key[0], self.key[1], self.key[2], frame as u64, u64::from(slice)];
        let mut draws = Draws::new(&key);
        let section = Section::of(self, frame, slice, &mut draws);
        let mut image = Vec::with_capacity((self.height * self.width) as usize);
        let mut label = Vec::with_capacity(image.capacity());
        for y in 0..self.height {
            for x in 0..self.width {
                let (class, muscle_like) = section.class_at(y as f32, x as f32);
                label.push(class);
                image.push(match class {
                    0 => self.surroundings(y as f32, x as f32),
                    2 => self.muscle,
                    _ if muscle_like => 0.5 * (self.muscle + self.blood),
                    _ => self.blood,
                });
            }
        }
        blur(&mut image, self.width as usize, self.blur_px);
        self.degrade(&mut image, &mut draws);
        (image, label)
    }

    /// Body, lung and distractors.
    fn surroundings(&self, y: f32, x: f32) -> f32 {
        let (v, u) = (y / self.height as f32, x / self.width as f32);
        let body = ((v - 0.5) / 0.49).powi(2) + ((u - 0.5) / 0.49).powi(2);
        let mut value = if body > 1.0 {
            0.0
        } else if body > 0.8 {
            self.tissue * 1.5
        } else {
            let side = self.height.min(self.width) as f32;
            let (dy, dx) = ((y - self.centre_px.0) / side, (x - self.centre_px.1) / side);
            // Fat and tissue close to the heart, lung beyond.
            if dy * dy + dx * dx < 0.1 || v > 0.72 { self.tissue } else { self.lung }
        };
        for thing in &self.distractors {
            let far = ((v - thing.y).powi(2) + (u - thing.x).powi(2)).sqrt() / thing.radius;
            if far < 1.0 {
                value = if thing.ring && far < 0.6 { self.blood } else { thing.intensity };
                if thing.ring && far >= 0.6 {
                    value = self.muscle;
                }
            }
        }
        value
    }

    /// Bias field, contrast and noise.
    fn degrade(&self, image: &mut [f32], draws: &mut Draws) {
        let width = self.width as usize;
        for (at, values) in image.chunks_mut(2).enumerate() {
            let (a, b) = draws.normals();
            for (value, (offset, normal)) in values.iter_mut().zip([(0, a), (1, b)]) {
                let pixel = at * 2 + offset;
                let v = (pixel / width) as f32 / self.height as f32 - 0.5;
                let u = (pixel % width) as f32 / self.width as f32 - 0.5;
                let bias = 1.0 + self.bias[0] * v + self.bias[1] * u + self.bias[2] * 4.0 * u * v;
                *value = (value.max(0.0).powf(self.gamma) * bias + self.noise * normal).max(0.0);
            }
        }
    }
}

/// One slice's anatomy, in pixels.
struct Section {
    centre: (f32, f32),
    axis: (f32, f32),
    ellipticity: f32,
    cavity: f32,
    outer: f32,
    /// Centre of the right ventricle's circle and its radius; none near the apex.
    rv: Option<((f32, f32), f32)>,
    wobble: (f32, f32),
    papillary: [(f32, f32, f32); 2],
}

impl Section {
    fn of(heart: &Heart, frame: Frame, slice: u32, draws: &mut Draws) -> Self {
        let side = heart.height.min(heart.width) as f32;
        // 0 at the base, 1 at the apex.
        let depth = slice as f32 / (heart.slices - 1) as f32;
        let taper = 1.0 - 0.6 * depth * depth;
        let squeeze = if frame == Frame::Systole { heart.contraction } else { 1.0 };
        let cavity = side * heart.lv_radius * taper * squeeze;
        // The muscle keeps its volume: a smaller cavity has a thicker wall.
        let wall = side * heart.wall * (1.0 - 0.25 * depth) / squeeze.sqrt();
        let outer = cavity + wall;
        let drift = side * 0.04 * depth;
        let (sine, cosine) = (heart.towards_rv + 0.3 * depth).sin_cos();
        let centre = (
            heart.centre_px.0 + drift + draws.uniform(-0.6, 0.6),
            heart.centre_px.1 + drift + draws.uniform(-0.6, 0.6),
        );
        let reach = heart.rv_reach * (1.0 - 0.8 * depth.powi(2)) * (0.5 + 0.5 * squeeze);
        let rv = (depth < 0.88).then(|| {
            let away = outer * 0.55 + side * 0.06 * reach;
            ((centre.0 + away * sine, centre.1 + away * cosine), side * 0.165 * reach)
        });
        let papillary = [0.9, -1.1].map(|turn: f32| {
            let (sine, cosine) = (heart.towards_rv + PI + turn).sin_cos();
            (centre.0 + cavity * 0.6 * sine, centre.1 + cavity * 0.6 * cosine, cavity * 0.22)
        });
        Self {
            centre,
            axis: (sine, cosine),
            ellipticity: heart.ellipticity,
            cavity,
            outer,
            rv,
            wobble: (draws.uniform(0.0, 0.05), draws.uniform(0.0, TAU)),
            papillary,
        }
    }

    /// The class of a pixel, and whether it looks like muscle although it counts as blood.
    fn class_at(&self, y: f32, x: f32) -> (u8, bool) {
        let (dy, dx) = (y - self.centre.0, x - self.centre.1);
        let along = dy * self.axis.0 + dx * self.axis.1;
        let across = dx * self.axis.0 - dy * self.axis.1;
        let angle = across.atan2(along);
        let wobble = 1.0 + self.wobble.0 * (3.0 * angle + self.wobble.1).sin();
        let far = (along.powi(2) + (across * self.ellipticity).powi(2)).sqrt() / wobble;
        if far < self.cavity {
            let papillary = self.papillary.iter().any(|(py, px, r)| (y - py).hypot(x - px) < *r);
            return (3, papillary);
        }
        if far < self.outer {
            return (2, false);
        }
        let in_rv =
            self.rv.is_some_and(|((ry, rx), radius)| ((y - ry) * 0.8).hypot(x - rx) < radius);
        (u8::from(in_rv && along > 0.0), false)
    }
}

/// Separable Gaussian blur; the border repeats its last pixel.
fn blur(image: &mut Vec<f32>, width: usize, sigma_px: f32) {
    let reach = (sigma_px * 2.5).ceil() as isize;
    let weights: Vec<f32> =
        (-reach..=reach).map(|at| (-0.5 * (at as f32 / sigma_px).powi(2)).exp()).collect();
    let total: f32 = weights.iter().sum();
    let height = image.len() / width;
    let pass = |from: &[f32], len: usize, step: usize, of: &dyn Fn(usize) -> (usize, usize)| {
        let mut out = Vec::with_capacity(from.len());
        for pixel in 0..from.len() {
            let (start, at) = of(pixel);
            let sum: f32 = (-reach..=reach)
                .zip(&weights)
                .map(|(offset, weight)| {
                    let at = at.saturating_add_signed(offset).min(len - 1);
                    from[start + at * step] * weight
                })
                .sum();
            out.push(sum / total);
        }
        out
    };
    let rows = pass(image, width, 1, &|pixel| (pixel - pixel % width, pixel % width));
    *image = pass(&rows, height, width, &|pixel| (pixel % width, pixel / width));
}
