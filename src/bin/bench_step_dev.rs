//! dev only
use cpcr::bench::step::{StepOptions, run};
fn main() {
    let mut o = StepOptions::default();
    for a in std::env::args().skip(1) {
        let (k, v) = a.split_once('=').unwrap();
        match k {
            "batch" => o.batch = v.parse().unwrap(),
            "side" => o.side = v.parse().unwrap(),
            "steps" => o.steps = v.parse().unwrap(),
            "settle" => o.settle = v.parse().unwrap(),
            "gap" => o.gap_steps = v.parse().unwrap(),
            "threads" => o.threads = v.parse().unwrap(),
            _ => panic!(),
        }
    }
    o.peer_python = std::env::var_os("CPCR_PEER_PYTHON").map(Into::into);
    println!("{}", serde_json::to_string_pretty(&run(&o).unwrap()).unwrap());
}
