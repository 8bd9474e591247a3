// Custom resources of the examples, held to types and validators that were made from their own definitions: TypeScript
// refuses fields that are not there and values of another type, the validators what is required, enumerated or bounded.
// node custom_resources.mjs DOCUMENTS.json, in a folder in which the packages are installed. Called by .ci/kubernetes.
import { execFileSync } from "node:child_process";
import { readFileSync, writeFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const documents = JSON.parse(readFileSync(process.argv[2]));
const packages = {
  "monitoring.coreos.com": "prometheus-operator",
  "keda.sh": "keda",
  "gateway.networking.k8s.io": "gateway-api",
};

/** Why a document is refused, or nothing. */
async function refusal(document) {
  const name = packages[document.apiVersion.split("/")[0]];
  const module = `@kubernetes-models/${name}/${document.apiVersion}/${document.kind}`;
  try {
    const model = (await import(pathToFileURL(`node_modules/${module}.js`)))[document.kind];
    new model(document).validate();
  } catch (error) {
    return error.message;
  }
  const literal = JSON.stringify(document, null, 1);
  const type = `I${document.kind}`;
  writeFileSync("one.ts", `import type { ${type} } from "${module}";\nexport const one: ${type} = ${literal};\n`);
  const flags = ["--noEmit", "--strict", "--skipLibCheck", "--target", "es2022", "--module", "nodenext", "one.ts"];
  try {
    execFileSync("node_modules/.bin/tsc", flags, { encoding: "utf8" });
  } catch (error) {
    return error.stdout;
  }
}

/** A document with one thing changed, given by its keys; undefined removes it. */
function planted(kind, keys, value) {
  const document = structuredClone(Object.values(documents).find((one) => one.kind === kind));
  const place = keys.slice(0, -1).reduce((inside, key) => inside[key], document);
  place[keys.at(-1)] = value;
  return document;
}

let failed = false;
for (const [name, document] of Object.entries(documents)) {
  const why = await refusal(document);
  if (why) failed = true;
  console.log(why ? `${name}: ${why}` : `ok ${name}`);
}
for (const [kind, keys, value] of [
  ["PodMonitor", ["spec", "podMetricsEndpoints", 0, "scrapeInterval"], "5s"],
  ["PodMonitor", ["spec", "podMetricsEndpoints", 0, "interval"], "5 seconds"],
  ["PodMonitor", ["spec", "selector"], undefined],
  ["PrometheusRule", ["spec", "groups", 0, "rules", 0, "alerts"], "x"],
  ["PrometheusRule", ["spec", "groups", 0, "name"], undefined],
  ["HTTPRoute", ["spec", "rules", 0, "timeouts", "request"], "for ever"],
  ["HTTPRoute", ["spec", "rules", 0, "timeout"], "0s"],
  ["HTTPRoute", ["spec", "rules", 0, "matches", 0, "path", "type"], "Prefix"],
  ["ScaledObject", ["spec", "fallback", "replica"], 4],
  ["ScaledObject", ["spec", "maxReplicaCount"], "8"],
  ["ScaledObject", ["spec", "triggers"], undefined],
]) {
  const why = await refusal(planted(kind, keys, value));
  console.log(`planted: ${kind} ${keys.join(".")} = ${value}: ${why ?? "NOT REFUSED"}`);
  if (!why) failed = true;
}
const kinds = new Set(Object.values(documents).map((one) => one.kind));
process.exit(failed || kinds.size !== 4 ? 1 : 0);
